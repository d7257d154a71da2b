"""From raw video to scored, balanced Parquet manifests (Waver §3)."""
