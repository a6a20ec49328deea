"""The ground: types that cross files, bounds of fields, text as a terminal shows it. No torch."""
