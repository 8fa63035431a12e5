//! Scans, and the layers that are made of them.
use mlx_primitives::scan::*;

use super::*;

pub(super) fn scans(hostile: &mut Hostile) {
    let rank = 1 + hostile.0.below(3);
    let shape = hostile.shape(rank);
    let axis = hostile.pick(&[0, -1, rank as i32 - 1]);
    let place = if axis < 0 { rank - 1 } else { axis as usize };
    let dtype = hostile.pick(&FLOATING);
    let (x, mut decay) = (hostile.array(&shape, dtype), shape.clone());
    decay[hostile.0.below(rank)] = 1;
    let of_decay = hostile.pick(&FLOATING);
    let a = hostile.array(&decay, of_decay);
    let (mut rest, length) = (shape.clone(), shape[place]);
    let cuts = [0, length / 2, hostile.or(length, &INTEGERS)];
    let usual = hostile.maybe(&cuts[..]);
    let segments = hostile.or(usual, &[Some(&cuts[1..]), Some(&cuts[..1]), Some(&[])]);
    let states = segments.map(|cuts| (cuts.len() as i32 - 1).max(0));
    rest.splice(place..=place, states);
    let state = hostile.array(&rest, Float32);
    let state = hostile.maybe(state);
    let options = ScanOptions {
        axis: hostile.or(axis, &INTEGERS),
        exclusive: hostile.pick(&[true, false]),
        reverse: hostile.pick(&[true, false]),
        initial_state: state.as_ref(),
        segments,
        dispatch: hostile.dispatch(),
    };
    let last = Array::zeros::<f32>(&rest).unwrap();
    let like = if [a.dtype(), x.dtype()].contains(&Complex64) {
        x.as_dtype(Complex64).unwrap()
    } else {
        x.clone()
    };
    let last = last.as_dtype(if like.dtype() == Complex64 { Complex64 } else { Float32 }).unwrap();
    // Another axis that happens to be one has another state.
    if options.axis == axis && x.shape() == shape {
        judge_both("affine_scan", affine_scan_with_state(&a, &x, options), [&like, &last]);
        let operator = hostile.pick(&[ScanOperator::Mul, ScanOperator::LogAddExp]);
        judge_both(
            "associative_scan",
            associative_scan_with_state(&x, operator, options),
            [&x, &last],
        );
    } else {
        judge("affine_scan", affine_scan(&a, &x, options), x.shape(), like.dtype());
    }
}

pub(super) fn selective_scans(hostile: &mut Hostile) {
    let dtype = hostile.pick(&FLOATING);
    let [batch, length, channels, states] = [0; 4].map(|_| hostile.pick(&SIZES));
    let groups = hostile.or(1, &SIZES);
    let grouped = [&[batch, length, groups, states][..], &[batch, length, states]];
    let by_state = hostile.pick(&grouped);
    let [u, delta, z] = [0; 3].map(|_| hostile.array(&[batch, length, channels], dtype));
    let [b, c] = [0; 2].map(|_| hostile.array(by_state, dtype));
    let [d, bias] = [0; 2].map(|_| hostile.array(&[channels], Float32));
    let a = hostile.array(&[channels, states], Float32);
    let segments = [0, length / 2, hostile.or(length, &INTEGERS)];
    let segments = hostile.or(None, &[Some(&segments[..]), Some(&[][..])]);
    let sequences = segments.map_or(batch, |cuts| cuts.len() as i32 - 1).max(0);
    let state = hostile.array(&[sequences, channels, states], Float32);
    let options = SelectiveScanOptions {
        d: hostile.maybe(&d),
        z: hostile.maybe(&z),
        delta_bias: hostile.maybe(&bias),
        delta_softplus: hostile.pick(&[true, false]),
        initial_state: Some(&state),
        segments,
        dispatch: hostile.pick(&[Dispatch::Auto, Dispatch::Only(Backend::Builtin)]),
    };
    let result = selective_scan_with_state(&u, &delta, &a, &b, &c, options);
    judge_both("selective_scan", result, [&u, &state]);
    let [u, delta] = [0; 2].map(|_| hostile.array(&[batch, channels], dtype));
    let [b, c] = [0; 2].map(|_| hostile.array(&[batch, states], dtype));
    let result = selective_state_update(&state, &u, &delta, &a, &b, &c, Default::default());
    judge_both("selective_state_update", result, [&u, &state]);
    let [x, before] =
        [length, states - 1].map(|l| hostile.array(&[batch, l.max(0), channels], dtype));
    let weight = hostile.array(&[channels, states], Float32);
    let options = CausalConvOptions {
        bias: options.d,
        silu: options.delta_softplus,
        initial_state: Some(&before),
        segments,
    };
    judge_both("causal_conv1d", causal_conv1d_with_state(&x, &weight, options), [&x, &before]);
}

pub(super) fn state_space_layers(hostile: &mut Hostile) {
    let small = |hostile: &mut Hostile, usual| hostile.or(usual, &[0, 1, 3, -1, i32::MIN]);
    let (states, dtype) = (small(hostile, 4), hostile.pick(&FLOATING));
    let [batch, tokens] = [0; 2].map(|_| hostile.pick(&SIZES));
    let ask = |op: &str, y: Result<Array, mlx_rs::error::Exception>, x: &Array| match y {
        // Dense projections promote to the dtype of their weights.
        Ok(y) => judge(op, Ok(y), x.shape(), Float32),
        Err(error) => assert!(error.what().starts_with('['), "{op}: {error}"),
    };
    let x = hostile.array(&[batch, tokens, 6], dtype);
    let token = hostile.array(&[batch, 6], dtype);
    let builder = MambaBlockBuilder::new(6).d_state(states).d_conv(small(hostile, 4));
    if let Ok(mut block) = builder.expand(small(hostile, 2)).dt_rank(small(hostile, 1)).build() {
        let mut state = MambaState::default();
        ask("MambaBlock", block.forward((&x, &mut state)), &x);
        ask("MambaBlock", block.step(&token, &mut state).map_err(Into::into), &token);
    }
    let builder = Mamba2BlockBuilder::new(6).d_state(states).d_conv(small(hostile, 4));
    let builder = builder.expand(small(hostile, 2)).head_dim(small(hostile, 3));
    let builder = builder.n_groups(small(hostile, 2)).chunk_size(small(hostile, 2));
    if let Ok(mut block) = builder.build() {
        let mut state = MambaState::default();
        ask("Mamba2Block", block.forward((&x, &mut state)), &x);
        ask("Mamba2Block", block.step(&token, &mut state).map_err(Into::into), &token);
    }
    let bidirectional = hostile.pick(&[true, false]);
    if let Ok(mut layer) = S4Builder::new(6).d_state(states).bidirectional(bidirectional).build() {
        let mut state = None;
        ask("S4", layer.forward(&x), &x);
        ask("S4", layer.forward((&x, &mut state)), &x);
        ask("S4", layer.step(&token, &mut state).map_err(Into::into), &token);
    }
    let builder = H3Builder::new(6).d_state(states).d_shift(small(hostile, 3));
    if let Ok(mut layer) = builder.head_dim(small(hostile, 2)).build() {
        let mut state = H3State::default();
        ask("H3", layer.forward((&x, &mut state)), &x);
        ask("H3", layer.step(&token, &mut state).map_err(Into::into), &token);
    }
}

pub(super) fn scans_of_states(hostile: &mut Hostile) {
    let [batch, length, heads, size, width] = [0; 5].map(|_| hostile.pick(&[0, 1, 1, 2, 3, 33]));
    let (groups, dtype) = (hostile.pick(&[1, heads, 2]), hostile.pick(&FLOATING));
    let chunk_size = hostile.or(16, &INTEGERS);
    let x = hostile.array(&[batch, length, heads, size], dtype);
    let dt = hostile.array(&[batch, length, heads], dtype);
    let a = hostile.array(&[heads], dtype);
    let b = hostile.array(&[batch, length, groups, width], dtype);
    let state = hostile.array(&[batch, heads, size, width], Float32);
    let state = hostile.maybe(state);
    let cuts = [0, length / 2, hostile.or(length, &INTEGERS)];
    let cuts = hostile.maybe(&cuts[..]);
    let options = SsdOptions {
        chunk_size,
        dt_softplus: hostile.pick(&[true, false]),
        dt_bias: hostile.maybe(&a),
        d: hostile.maybe(&a),
        z: hostile.maybe(&x),
        initial_state: state.as_ref(),
        segments: cuts,
        dispatch: hostile.dispatch(),
        ..Default::default()
    };
    let input = SsdInput { x: &x, dt: &dt, a: &a, b: &b, c: &b };
    judge("ssd_scan", ssd_scan(input, options), x.shape(), x.dtype());
    let decay_shape = [batch, length, heads, size];
    let axes = hostile.pick(&[3, 4]);
    let decay = hostile.array(&decay_shape[..axes], dtype);
    let values = hostile.array(&[batch, length, heads, width], dtype);
    let options = GatedLinearOptions {
        log_decay: hostile.maybe(&decay),
        scale: [None, Some(hostile.pick(&NUMBERS))][hostile.0.below(2)],
        chunk_size,
        segments: cuts,
        initial_state: state.as_ref(),
        dispatch: hostile.dispatch(),
    };
    let like = (values.shape(), values.dtype());
    judge(
        "gated_linear_attention",
        gated_linear_attention(&x, &x, &values, options),
        like.0,
        like.1,
    );
    judge("gated_delta_rule", gated_delta_rule(&x, &x, &values, &dt, options), like.0, like.1);
    let elements = [x.clone(), dt.clone()];
    let axis = hostile.or(1, &INTEGERS);
    let first = |first: &[Array], _: &[Array]| Ok(first.to_vec());
    let reverse = hostile.pick(&[true, false]);
    let generic = GenericScanOptions { axis, reverse, segments: cuts };
    let scanned = generic_scan(&elements, first, generic).map(|mut scanned| scanned.remove(0));
    judge("generic_scan", scanned, x.shape(), x.dtype());
}
