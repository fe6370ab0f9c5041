"""Scripts of the checkout: what is no part of the package."""
