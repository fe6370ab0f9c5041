"""A project of one's own: data, a model and a loss that ``counterpoise-train`` finds by their dotted names."""
