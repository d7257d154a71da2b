"""What a clip shows, as facts: measured from frames, written as sentences, read back from them, compared with a prompt.

`measure` and `reading` fill `SceneFacts` from pixels, `sentences` writes them, `parsing` reads a caption or a plain prompt
into the same facts, and `comparing` says which facts of a prompt a video shows.
"""
