"""Files of Keras 2 as plain data: what runs in the process that reads them, and needs no Keras."""
