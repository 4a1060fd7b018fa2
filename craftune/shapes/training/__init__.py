"""How the embedded model and its reward towers were trained; nothing here runs in a recipe."""
