//! Attention: over prompts, which is arithmetic, and of one new token, which is memory.

mod decode;
mod options;
mod prompt;
mod window;

use anyhow::Result;

use crate::support::{Case, Setting};

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let subjects = [prompt::cases, options::cases, window::cases, decode::cases];
    let cases = subjects.into_iter().map(|cases| cases(setting)).collect::<Result<Vec<_>>>()?;
    Ok(cases.into_iter().flatten().collect())
}
