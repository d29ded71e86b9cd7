"""The suite. A regular package, so that a stray `tests` in site-packages cannot take its place."""
