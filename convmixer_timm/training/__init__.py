"""timm's scripts, run with this package's variants, recipes and settings."""
