"""Token embeddings, output layers and tokenizers made smaller together."""
