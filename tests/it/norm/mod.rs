mod layer_norm;
mod rms_norm;
mod rms_norm_linear;
