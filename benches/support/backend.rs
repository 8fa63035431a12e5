//! Which backend a call took, by listening to what the crate traces.

use std::sync::{Arc, Mutex};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::with_default,
};

/// Runs `call` and names the backend of the outermost operation in it, if that had a choice.
pub(crate) fn taken_by<T>(call: impl FnOnce() -> T) -> (T, Option<String>) {
    let heard = Arc::new(Mutex::new(None));
    let result = with_default(Listener(Arc::clone(&heard)), call);
    let backend = heard.lock().ok().and_then(|mut heard| heard.take());
    (result, backend)
}

/// Keeps the first backend it hears of: an operation decides before those it is made of.
struct Listener(Arc<Mutex<Option<String>>>);

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "mlx_primitives::dispatch"
    }

    fn event(&self, event: &Event<'_>) {
        if let Ok(mut heard) = self.0.lock() {
            event.record(&mut FirstBackend(&mut heard));
        }
    }

    // The crate opens no spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct FirstBackend<'a>(&'a mut Option<String>);

impl Visit for FirstBackend<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "backend" {
            self.0.get_or_insert_with(|| format!("{value:?}"));
        }
    }
}
