//! The key-value pairs of a GGUF file.

use std::{collections::HashMap, io::Read};

use anyhow::{Context, Result, bail, ensure};

use super::reader::Reader;

/// The one key that is read while the header still is: where tensors may begin.
pub(super) const ALIGNMENT: &str = "general.alignment";

/// The type numbers of the GGUF specification that need a name here.
mod kind {
    pub(super) const U32: u32 = 4;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Texts(Vec<String>),
    /// Lists of floats and of truths, which nothing here reads.
    Skipped,
}

/// What a GGUF file says about its model.
#[derive(Debug, Default)]
pub(crate) struct Metadata(HashMap<String, Value>);

impl Metadata {
    pub(super) fn read<R: Read>(reader: &mut Reader<R>, count: u64) -> Result<Self> {
        let mut pairs = HashMap::new();
        for _ in 0..count {
            let key = reader.string()?;
            let kind = reader.u32()?;
            // MLX ignores an alignment of any other type, and would then read shifted weights.
            ensure!(key != ALIGNMENT || kind == kind::U32, "damaged: {ALIGNMENT} is not a u32");
            let value = value(reader, kind).with_context(|| format!("metadata {key:?}"))?;
            ensure!(!pairs.contains_key(&key), "damaged: metadata {key:?} appears twice");
            pairs.insert(key, value);
        }
        Ok(Self(pairs))
    }

    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "an integer", |value| match value {
            Value::Integer(integer) => Some(*integer),
            _ => None,
        })
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match value {
            Value::Float(float) => Some(*float),
            _ => None,
        })
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "a list of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Integers(integers) => Some(integers.as_slice()),
            _ => None,
        })
    }

    /// `None` without the key; an error where its value is of another type.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(value) => match cast(value) {
                None => bail!("metadata {key} is not {kind}"),
                found => Ok(found),
            },
        }
    }
}

/// Turns a missing key into an error that names it.
pub(crate) fn required<T>(key: &str, found: Result<Option<T>>) -> Result<T> {
    found?.with_context(|| format!("the file has no metadata {key}"))
}

fn value<R: Read>(reader: &mut Reader<R>, kind: u32) -> Result<Value> {
    Ok(match kind {
        kind::STRING => Value::Text(reader.string()?),
        kind::ARRAY => array(reader)?,
        _ => scalar(reader, kind)?,
    })
}

fn scalar<R: Read>(reader: &mut Reader<R>, kind: u32) -> Result<Value> {
    Ok(match kind {
        0 => Value::Integer(u8::from_le_bytes(reader.bytes()?).into()),
        1 => Value::Integer(i8::from_le_bytes(reader.bytes()?).into()),
        2 => Value::Integer(u16::from_le_bytes(reader.bytes()?).into()),
        3 => Value::Integer(i16::from_le_bytes(reader.bytes()?).into()),
        kind::U32 => Value::Integer(reader.u32()?.into()),
        5 => Value::Integer(i32::from_le_bytes(reader.bytes()?).into()),
        6 => Value::Float(f32::from_le_bytes(reader.bytes()?).into()),
        7 => Value::Bool(reader.bytes::<1>()? != [0]),
        10 => Value::Integer(i64::try_from(reader.u64()?).context("a number above 2^63")?),
        11 => Value::Integer(i64::from_le_bytes(reader.bytes()?)),
        // MLX steps over four of its eight bytes, and takes what follows for the next key.
        12 => bail!("a 64-bit float, which MLX misreads"),
        _ => bail!("damaged: values of type {kind} do not exist"),
    })
}

fn array<R: Read>(reader: &mut Reader<R>) -> Result<Value> {
    let kind = reader.u32()?;
    match kind {
        kind::STRING => {
            let count = reader.count(size_of::<u64>() as u64)?;
            Ok(Value::Texts((0..count).map(|_| reader.string()).collect::<Result<_>>()?))
        }
        kind::ARRAY => bail!("a list of lists, which MLX cannot load"),
        _ => scalars(reader, kind),
    }
}

fn scalars<R: Read>(reader: &mut Reader<R>, kind: u32) -> Result<Value> {
    let count = reader.count(1)?;
    let mut integers = Vec::new();
    for _ in 0..count {
        if let Value::Integer(integer) = scalar(reader, kind)? {
            integers.push(integer);
        }
    }
    let skipped = integers.is_empty() && count > 0;
    Ok(if skipped { Value::Skipped } else { Value::Integers(integers) })
}
