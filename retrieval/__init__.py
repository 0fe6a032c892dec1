"""The side that users of a trained model see: encode, rank, measure."""
