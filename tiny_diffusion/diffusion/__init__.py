"""The method, from schedule to image.  All but process, guidance, editing and sampling need numpy only."""
