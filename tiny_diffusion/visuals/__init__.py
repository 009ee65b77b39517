"""Everything that a person looks at: image grids, animations and figures.  Arrays come in, files go out."""
