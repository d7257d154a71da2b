"""From a tier's manifest to the samples of every step."""
