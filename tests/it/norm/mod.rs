mod add_layer_norm;
mod add_rms_norm;
mod gated_rms_norm;
mod layer_norm;
mod rms_norm;
mod rms_norm_linear;
