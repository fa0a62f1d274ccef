"""From files to batches: sources, formats, templates, rendering with proven masks, splitting, packing, loading."""
