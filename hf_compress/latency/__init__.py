"""How fast a model is here, and which sizes make it as fast as asked for."""
