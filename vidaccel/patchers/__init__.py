"""One file a model family: which transformers it is, where their video attention sits, and how it is called."""
