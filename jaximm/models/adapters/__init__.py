"""Small trees of parameters beside a model's own."""
