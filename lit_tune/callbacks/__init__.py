"""Lightning callbacks, one a file: what a run shows, measures and keeps."""
