//! Keys and values of tokens in slots, in whatever form.

use mlx_rs::{
    Array, Dtype,
    ops::{
        concatenate,
        indexing::{TryIndexMutOp, TryIndexOp},
        zeros_dtype,
    },
};

use super::form::KvForm;
use crate::{
    check::{Axis, Check},
    error::Result,
    layout::Layout,
};

/// The forms of keys and of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Forms {
    pub(super) keys: KvForm,
    pub(super) values: KvForm,
}

/// Room for the keys and values of tokens, `[B, H_kv, SLOTS, D]` and `[B, H_kv, SLOTS, D_v]`.
#[derive(Debug, Clone)]
pub(super) struct Store {
    keys: Column,
    values: Column,
}

/// Keys, or values.
#[derive(Debug, Clone)]
struct Column {
    form: KvForm,
    /// `[B, H_kv, SLOTS, _]` each.
    arrays: Vec<Array>,
    dtype: Dtype,
    size: i32,
}

/// New tokens, `[B, H_kv, S, D]` and `[B, H_kv, S, D_v]`.
#[derive(Debug, Clone)]
pub(super) struct Tokens {
    pub(super) keys: Array,
    pub(super) values: Array,
}

impl Tokens {
    /// Checks new tokens, against what is held if something is.
    pub(super) fn new(
        check: Check,
        [keys, values]: [&Array; 2],
        layout: Layout,
        forms: Forms,
        held: Option<&Store>,
    ) -> Result<Self> {
        check.shape("keys", keys, &layout.axes("B", "S", "H_kv", "D"))?;
        check.floating("keys", keys)?;
        let [batch, tokens, heads, size] = layout.dims(keys);
        check.shape("values", values, &layout.axes(batch, tokens, heads, "D_v"))?;
        check.dtype_among("values", values, &[keys.dtype()])?;
        forms.keys.check(check, "keys", size)?;
        forms.values.check(check, "values", values.dim(3))?;
        if let Some(Store { keys: of_keys, values: of_values }) = held {
            let [batch, heads] = [0, 1].map(|axis| Axis::Is(of_keys.dim(axis)));
            check.shape("keys", keys, &layout.axes(batch, "S", heads, of_keys.size))?;
            check.dtype_among("keys", keys, &[of_keys.dtype])?;
            check.shape("values", values, &layout.axes(batch, "S", heads, of_values.size))?;
        }
        let (keys, values) = (layout.swap_with_bhsd(keys)?, layout.swap_with_bhsd(values)?);
        Ok(Self { keys, values })
    }

    pub(super) fn count(&self) -> i32 {
        self.keys.dim(2)
    }

    /// Those from number `first` on.
    pub(super) fn last_from(&self, first: i32) -> Result<Self> {
        let part = |array: &Array| array.try_index((.., .., first.., ..));
        Ok(Self { keys: part(&self.keys)?, values: part(&self.values)? })
    }

    /// Those up to number `end`.
    pub(super) fn first_to(&self, end: i32) -> Result<Self> {
        let part = |array: &Array| array.try_index((.., .., ..end, ..));
        Ok(Self { keys: part(&self.keys)?, values: part(&self.values)? })
    }

    /// The tokens of all, one after another.
    pub(super) fn joined(parts: &[Self]) -> Result<Self> {
        if let [one] = parts {
            return Ok(one.clone());
        }
        let keys: Vec<_> = parts.iter().map(|part| &part.keys).collect();
        let values: Vec<_> = parts.iter().map(|part| &part.values).collect();
        Ok(Self { keys: concatenate(&keys, 2)?, values: concatenate(&values, 2)? })
    }

    /// What is left of them in these forms.
    pub(super) fn as_stored(&self, forms: Forms) -> Result<Self> {
        if forms == Forms::default() {
            return Ok(self.clone());
        }
        let mut store = Store::like(self, forms, self.count())?;
        store.write(0, self)?;
        store.read(0, self.count())
    }

    pub(super) fn in_layout(&self, layout: Layout) -> Result<(Array, Array)> {
        Ok((layout.swap_with_bhsd(&self.keys)?, layout.swap_with_bhsd(&self.values)?))
    }
}

impl Store {
    /// Room of `slots`, of zeros, for tokens like these.
    pub(super) fn like(tokens: &Tokens, forms: Forms, slots: i32) -> Result<Self> {
        Ok(Self {
            keys: Column::like(&tokens.keys, forms.keys, slots)?,
            values: Column::like(&tokens.values, forms.values, slots)?,
        })
    }

    pub(super) fn batch(&self) -> i32 {
        self.keys.dim(0)
    }

    pub(super) fn slots(&self) -> i32 {
        self.keys.dim(2)
    }

    pub(super) fn forms(&self) -> Forms {
        Forms { keys: self.keys.form, values: self.values.form }
    }

    pub(super) fn nbytes(&self) -> usize {
        self.arrays().map(Array::nbytes).sum()
    }

    /// As many slots more, of zeros.
    pub(super) fn grown(&self, slots: i32) -> Result<Self> {
        self.map(|array| {
            let shape = [array.dim(0), array.dim(1), slots, array.dim(3)];
            let room = zeros_dtype(&shape, array.dtype())?;
            Ok(concatenate(&[array, &room], 2)?)
        })
    }

    /// `held` with tokens written from slot `first` on; with `slots` of them, where there was no such slot yet.
    pub(super) fn appended(
        held: Option<&Self>,
        first: i32,
        tokens: &Tokens,
        forms: Forms,
        slots: i32,
    ) -> Result<Self> {
        let mut store = match held {
            None => Self::like(tokens, forms, slots)?,
            Some(store) if first + tokens.count() > store.slots() => {
                store.grown(slots - store.slots())?
            }
            Some(store) => store.clone(),
        };
        store.write(first, tokens)?;
        Ok(store)
    }

    /// Writes tokens from slot `first` on.
    pub(super) fn write(&mut self, first: i32, tokens: &Tokens) -> Result<()> {
        let end = first + tokens.count();
        if first == end {
            return Ok(());
        }
        self.keys.write(first, end, &tokens.keys)?;
        self.values.write(first, end, &tokens.values)
    }

    /// The tokens in these slots.
    pub(super) fn read(&self, first: i32, end: i32) -> Result<Tokens> {
        let part = |column: &Column| {
            let arrays =
                column.arrays.iter().map(|array| array.try_index((.., .., first..end, ..)));
            let arrays = arrays.collect::<Result<Vec<_>, _>>()?;
            column.form.decode(&arrays, column.dtype, column.size)
        };
        Ok(Tokens { keys: part(&self.keys)?, values: part(&self.values)? })
    }

    /// Another store of the results of `change` on each array.
    pub(super) fn map(&self, change: impl Fn(&Array) -> Result<Array>) -> Result<Self> {
        let column = |column: &Column| -> Result<Column> {
            let arrays = column.arrays.iter().map(&change).collect::<Result<_>>()?;
            Ok(Column { arrays, ..column.clone() })
        };
        Ok(Self { keys: column(&self.keys)?, values: column(&self.values)? })
    }

    /// Another store of the results of `join` on each array of all stores, which are of the same forms.
    pub(super) fn joined(
        stores: &[Self],
        join: impl Fn(Vec<&Array>) -> Result<Array>,
    ) -> Result<Option<Self>> {
        let Some(first) = stores.first() else { return Ok(None) };
        let column = |of: fn(&Self) -> &Column| -> Result<Column> {
            let count = of(first).arrays.len();
            let each = (0..count)
                .map(|n| join(stores.iter().filter_map(|store| of(store).arrays.get(n)).collect()));
            Ok(Column { arrays: each.collect::<Result<_>>()?, ..of(first).clone() })
        };
        Ok(Some(Self {
            keys: column(|store| &store.keys)?,
            values: column(|store| &store.values)?,
        }))
    }

    /// Whether rows of both could stand in one store.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let alike = |a: &Column, b: &Column| {
            (a.form, a.dtype, a.size, a.dim(1)) == (b.form, b.dtype, b.size, b.dim(1))
        };
        alike(&self.keys, &other.keys) && alike(&self.values, &other.values)
    }

    /// Every array, those of keys before those of values.
    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.keys.arrays.iter().chain(&self.values.arrays)
    }

    /// The dtype of tokens, and the sizes of keys and of values.
    pub(super) fn numbers(&self) -> (Dtype, [i32; 2]) {
        (self.keys.dtype, [self.keys.size, self.values.size])
    }

    /// A store of arrays in the order of [`Self::arrays`], if they are those of one.
    pub(super) fn from_arrays(
        forms: Forms,
        arrays: &[Array],
        (dtype, [size, value_size]): (Dtype, [i32; 2]),
    ) -> Result<Option<Self>> {
        if arrays.len() != forms.keys.arrays() + forms.values.arrays() {
            return Ok(None);
        }
        let (keys, values) = arrays.split_at(forms.keys.arrays());
        let column =
            |form, arrays: &[Array], size| Column { form, arrays: arrays.into(), dtype, size };
        let store = Self {
            keys: column(forms.keys, keys, size),
            values: column(forms.values, values, value_size),
        };
        let [batch, heads, slots] = match keys.first().map(Array::shape) {
            Some(&[batch, heads, slots, _]) => [batch, heads, slots],
            _ => return Ok(None),
        };
        let shape = |size| zeros_dtype(&[batch, heads, slots, size], dtype);
        let like = Tokens { keys: shape(size)?, values: shape(value_size)? };
        let expected = Self::like(&like, forms, slots)?;
        let fits = |(a, b): (&Array, &Array)| (a.shape(), a.dtype()) == (b.shape(), b.dtype());
        let fits = store.arrays().zip(expected.arrays()).all(fits);
        Ok(fits.then_some(store))
    }
}

impl Column {
    fn like(tokens: &Array, form: KvForm, slots: i32) -> Result<Self> {
        let one = tokens.try_index((.., .., ..0, ..))?;
        let room = |array: Array| {
            zeros_dtype(&[array.dim(0), array.dim(1), slots, array.dim(3)], array.dtype())
        };
        let arrays = form.encode(&one)?.into_iter().map(room).collect::<Result<_, _>>()?;
        Ok(Self { form, arrays, dtype: tokens.dtype(), size: tokens.dim(3) })
    }

    fn dim(&self, axis: i32) -> i32 {
        self.arrays.first().map_or(0, |array| array.dim(axis))
    }

    fn write(&mut self, first: i32, end: i32, tokens: &Array) -> Result<()> {
        for (array, part) in self.arrays.iter_mut().zip(self.form.encode(tokens)?) {
            array.try_index_mut((.., .., first..end, ..), part)?;
        }
        Ok(())
    }
}
