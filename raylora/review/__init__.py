"""Looking at what a run made: grids of previews, curves of its losses."""
