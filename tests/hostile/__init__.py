"""Files that lie: how to build them, and a fuzzer that looks for one that the readers fall for."""
