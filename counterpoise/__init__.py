"""counterpoise: losses, reweighting, contrastive objectives and recipes for when plain cross-entropy is not enough.

Rooms: :mod:`counterpoise.losses`, :mod:`counterpoise.samplers`, :mod:`counterpoise.contrastive`,
:mod:`counterpoise.recipes`. Import the room that you need; this package imports none of them by itself.
"""

__version__ = "0.1.0"
