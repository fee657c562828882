from bigmodel_kernels.ops.lstm_cell.op import lstm_cell as lstm_cell
