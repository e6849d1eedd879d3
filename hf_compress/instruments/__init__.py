"""The only code that touches modules: gates, masks, fake quantizers and recorders, put on and taken off."""
