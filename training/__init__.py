"""The training plane: the eleven stages of Waver Table 2 on curated manifests, from encoding to exported checkpoints."""
