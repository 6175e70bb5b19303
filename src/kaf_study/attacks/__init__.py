"""The attacks, one idea a file; `registry` knows them all by name."""
