"""The built-in spec types; they register through the entry-point group like anyone else's."""
