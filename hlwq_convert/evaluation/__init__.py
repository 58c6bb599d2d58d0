"""What a conversion did to a model's predictions: statistics, caches, tables and pictures, without torch."""
