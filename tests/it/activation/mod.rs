mod glu;
mod oracle;
mod pointwise;
mod softmax;
mod swish;
