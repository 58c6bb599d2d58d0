"""The formats that hlwq reads and writes: bytes to arrays and back, with no mathematics and no torch."""
