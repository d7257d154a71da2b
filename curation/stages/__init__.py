"""The funnel's stages, one file each; `curation.stage.load_stages` finds them by scanning this folder."""
