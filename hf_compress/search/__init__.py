"""How much each layer loses, searched with the user's own measure."""
