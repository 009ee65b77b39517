"""The mathematics: pure functions on floats and arrays, with numpy and the standard library only."""
