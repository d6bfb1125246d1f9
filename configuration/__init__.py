"""Every knob of a run: the typed recipe, the recipe files and the launch files for Accelerate."""
