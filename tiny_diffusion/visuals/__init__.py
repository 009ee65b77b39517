"""Everything a person looks at: image grids, animations, figures.  Arrays come in, files go out."""
