"""`gridmill/demo`: a toy model that ships inside the package, so that the first answer needs no download."""
