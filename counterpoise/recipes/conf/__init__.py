"""The YAML of counterpoise-train, found by Hydra as pkg://counterpoise.recipes.conf."""
