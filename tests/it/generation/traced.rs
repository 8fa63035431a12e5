//! What an engine traces.

use std::sync::Mutex;

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::set_global_default,
};

use super::{engine, options, params, prompt, request};

/// The tokens of every step, of whichever engine.
static STEPS: Mutex<Vec<u64>> = Mutex::new(Vec::new());

struct Steps;

impl Subscriber for Steps {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "mlx_primitives::generation" && metadata.name() == "step"
    }

    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        span.record(&mut Tokens);
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Tokens;

impl Visit for Tokens {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "tokens" {
            STEPS.lock().unwrap().push(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[test]
fn every_step_is_a_span() {
    set_global_default(Steps).unwrap();
    // As many tokens in a step as no other test has.
    let engine = engine(options());
    engine.generate(request(prompt(1, 499), 3, params(1, 1.0))).unwrap();
    let steps = STEPS.lock().unwrap();
    assert_eq!(steps.iter().filter(|&&tokens| tokens == 499).count(), 1);
    assert!(steps.iter().filter(|&&tokens| tokens == 1).count() >= 2, "{steps:?}");
}
