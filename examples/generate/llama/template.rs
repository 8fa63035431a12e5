//! The chat template inside a GGUF file, rendered as the libraries that trained the model do.

use anyhow::{Context, Result};
use minijinja::{Environment, Error, ErrorKind, context, syntax::SyntaxConfig};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::llama::{gguf::Metadata, tokenizer::Tokenizer};

/// One message of the user as the model expects it, up to where its answer begins.
pub(crate) fn render(metadata: &Metadata, tokenizer: &Tokenizer, content: &str) -> Result<String> {
    let template = metadata.text("tokenizer.chat_template")?;
    let template = template.context("the model has no chat template: pass --raw")?;
    let (begin, end) = (tokenizer.begin_text(), tokenizer.end_text());
    render_with(template, begin, end, content).context("the model's chat template")
}

fn render_with(template: &str, begin: &str, end: &str, content: &str) -> Result<String, Error> {
    environment()?.render_str(
        template,
        context! {
            messages => [context! { role => "user", content }],
            add_generation_prompt => true,
            bos_token => begin,
            eos_token => end,
        },
    )
}

/// Jinja with the settings and the Python methods that chat templates are written for.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    Ok(environment)
}

/// How a template refuses messages.
fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

#[cfg(test)]
mod tests {
    use super::{render, render_with};
    use crate::llama::{
        gguf::{Checkpoint, synthetic},
        testing::model_path,
        tokenizer::Tokenizer,
    };

    fn rendered(template: &str) -> String {
        render_with(template, "<s>", "</s>", " hi ").unwrap()
    }

    #[test]
    fn blocks_leave_no_blank_lines() {
        let template = "{{ bos_token }}\n{% for message in messages %}\n    {% if true %}\n\
                        {{ message['role'] }}\n    {% endif %}\n{% endfor %}\n{{ eos_token }}\n";
        assert_eq!(rendered(template), "<s>\nuser\n</s>");
    }

    #[test]
    fn python_methods_and_filters_work() {
        let content = "messages[0]['content']";
        assert_eq!(rendered(&format!("[{{{{ {content}.strip() }}}}]")), "[hi]");
        assert_eq!(rendered(&format!("[{{{{ {content} | trim }}}}]")), "[hi]");
        assert_eq!(rendered("{{ messages[0].get('name', 'none') }}"), "none");
        assert_eq!(rendered("{{ messages[0].content.split('i')[0] }}|"), " h|");
        assert_eq!(rendered("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}"), "2");
        assert_eq!(
            rendered("{% if tools is defined %}x{% endif %}{{ messages[1:] | length }}"),
            "0"
        );
        assert_eq!(rendered("{% for m in messages %}{% break %}{% endfor %}."), ".");
    }

    #[test]
    fn content_is_not_escaped_nor_rendered() {
        let rendered = render_with("{{ messages[0].content }}", "", "", "<b> & {{ x }}").unwrap();
        assert_eq!(rendered, "<b> & {{ x }}");
    }

    #[test]
    fn refusals_of_the_template_are_errors() {
        let refused = render_with("{{ raise_exception('no system role') }}", "", "", "");
        assert!(refused.unwrap_err().to_string().contains("no system role"));
        assert!(render_with("{% if %}", "", "", "").is_err());
    }

    #[test]
    fn a_model_without_a_template_asks_for_raw() {
        let metadata = synthetic::tokenizer().metadata();
        let tokenizer = Tokenizer::new(&metadata).unwrap();
        let error = render(&metadata, &tokenizer, "hi").unwrap_err();
        assert_eq!(error.to_string(), "the model has no chat template: pass --raw");
    }

    #[test]
    fn real_model_gets_its_default_system_message() {
        let Some(path) = model_path() else { return };
        let checkpoint = Checkpoint::open(&path).unwrap();
        let tokenizer = Tokenizer::new(checkpoint.metadata()).unwrap();
        assert_eq!(
            render(checkpoint.metadata(), &tokenizer, " Hi \n").unwrap(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
             Hugging Face<|im_end|>\n<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n",
        );
    }
}
