use mlx_primitives::{
    Error, Layout,
    attention::{FlashAttention, FlashAttentionBuilder, FlashAttentionInput, Window},
};
use mlx_rs::{Dtype, builder::Builder, module::Module};

use super::{
    asked::Asked,
    cases::{Case, MaskOf, boolean, case, third_row},
    flash::OP,
    flash_refusal::zeros,
    self_attention::assert_attention,
};
use crate::support::compare::{Tolerance, assert_close};

#[test]
fn the_module_is_part_of_one_that_trains_saves_and_composes() {
    let attention = FlashAttentionBuilder::new(2, 8).causal(true).build().unwrap();
    assert_attention(attention, 3);
}

#[test]
fn the_module_is_the_function() {
    let case = Case {
        causal: true,
        scale: Some(0.3),
        left: Some(2),
        soft_cap: Some(1.5),
        ..case("module", [1, 4, 2, 5, 7, 8, 3])
    };
    let asked = Asked::new(&case, Dtype::Float32);
    let mask = boolean(&[5, 7], third_row);
    let swapped = asked.inputs.each_ref().map(|array| array.swap_axes(1, 2).unwrap());
    let [queries, keys, values] = &swapped;
    let mut module = FlashAttentionBuilder::new(4, 8)
        .num_kv_heads(2)
        .causal(true)
        .scale(0.3)
        .window(Window { left: Some(2), right: None })
        .soft_cap(1.5)
        .layout(Layout::Bhsd)
        .build()
        .unwrap();
    let mut check = |input: FlashAttentionInput, of_mask: Option<MaskOf>| {
        let y = module.forward(input).unwrap().swap_axes(1, 2).unwrap();
        let case = Case { mask: of_mask, ..case };
        let (expected, _) = Asked::new(&case, Dtype::Float32).tensors().expected(&case, None);
        assert_close("FlashAttention", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    };
    check((queries, keys, values).into(), None);
    let array = mask.array();
    check((queries, keys, values, &array).into(), Some(mask));
    check((queries, keys, values, Some(&array)).into(), Some(mask));
}

#[test]
fn the_module_refuses_other_heads() {
    let mut module = FlashAttentionBuilder::new(4, 8).num_kv_heads(2).build().unwrap();
    let mut call = |queries: &[i32], keys: &[i32]| {
        let (queries, keys) = (zeros(queries), zeros(keys));
        module.forward((&queries, &keys, &keys)).unwrap_err().what().to_owned()
    };
    assert_eq!(
        call(&[2, 5, 2, 8], &[2, 7, 2, 8]),
        "[FlashAttention] queries must have shape [B, S_q, 4, 8] but got [2, 5, 2, 8]"
    );
    assert_eq!(
        call(&[2, 5, 4, 8], &[2, 7, 4, 8]),
        "[FlashAttention] keys must have shape [B, S_kv, 2, 8] but got [2, 7, 4, 8]"
    );
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let refused = |builder: FlashAttentionBuilder| match builder.build() {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let of = FlashAttentionBuilder::new;
    assert_eq!(refused(of(0, 8)), "num_heads");
    assert_eq!(refused(of(4, 0)), "head_dim");
    assert_eq!(refused(of(4, 8).num_kv_heads(0)), "num_kv_heads");
    assert_eq!(refused(of(4, 8).num_kv_heads(3)), "num_heads");
    assert_eq!(refused(of(4, 8).scale(f32::NAN)), "scale");
    assert_eq!(refused(of(4, 8).soft_cap(0.0)), "soft_cap");
    assert_eq!(refused(of(4, 8).window(Window { left: Some(-1), right: None })), "window.left");
    assert!(matches!(FlashAttention::new(4, 0), Err(Error::Value { argument: "head_dim", .. })));
}
