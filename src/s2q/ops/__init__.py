"""Operations with an exact reference each; a folder an op, a module a backend."""
