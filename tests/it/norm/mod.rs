mod add_rms_norm;
mod layer_norm;
mod rms_norm;
mod rms_norm_linear;
