//! The text that MLX makes of a kernel and gives to Apple's compiler.

use crate::source::{Input, Source};

/// What [`generate`] makes of a [`Source`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// MLX's text, to the letter, without the library that MLX puts before it.
    pub text: String,
    /// The name of the function.
    pub function: String,
    /// The function's template arguments, `<float, 4>`, or nothing.
    pub template: String,
    /// What each of the function's buffers is, in order.
    pub buffers: Vec<Slot>,
    /// The attributes that the function takes after its buffers.
    pub attributes: Vec<&'static str>,
    /// Where in `text` the line starts that makes the template's one instance.
    pub(crate) instance: usize,
}

/// What one buffer of a function holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The elements of an input.
    Input(usize),
    /// The shape of an input, as `int32_t`.
    Shape(usize),
    /// The strides of an input, as `int64_t`.
    Strides(usize),
    /// How many axes an input has, as `int32_t`.
    Ndim(usize),
    /// The elements of an output.
    Output(usize),
}

/// Every attribute that MLX looks for in a body, in its order, with its type.
pub const ATTRIBUTES: [(&str, &str); 20] = [
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
];

/// Writes what MLX 0.32.2 compiles for `source`.
///
/// The result is MLX's text byte for byte: golden tests compare it with what MLX itself writes. Where MLX's text is
/// wrong (several outputs, a `_shape` and no attribute at all), so is this.
pub fn generate(source: &Source) -> Generated {
    let arguments: Vec<_> = source.template.iter().map(|(_, value)| value.argument()).collect();
    let template =
        if arguments.is_empty() { String::new() } else { format!("<{}>", arguments.join(", ")) };
    let function = function_name(source, &arguments);
    let attributes = attributes(&source.body);
    let (parameters, buffers) = parameters(source, &attributes);
    let mut text = format!(
        "{}{}[[kernel]] void {function}(\n{parameters}{}\n}}\n",
        source.header,
        template_line(source),
        source.body
    );
    let instance = text.len();
    if !template.is_empty() {
        let whole = format!("{function}{template}");
        text += &format!(
            "\ntemplate [[host_name(\"{function}\")]] [[kernel]] decltype({whole}) {whole};\n"
        );
    }
    let attributes = attributes.into_iter().map(|(name, _)| name).collect();
    Generated { text, function, template, buffers, attributes, instance }
}

/// The types that MLX's name for a kernel ends in make it another for each text.
fn function_name(source: &Source, arguments: &[String]) -> String {
    let mut name = format!("custom_kernel_{}", source.name);
    if !arguments.is_empty() {
        name += "__";
        name += &arguments.join("_");
    }
    for input in &source.inputs {
        let passed = match () {
            () if input.shape.is_empty() => "s",
            () if input.is_constant() => "c",
            () => "",
        };
        name += &format!("_{}{passed}", input.element.name());
    }
    for output in &source.outputs {
        name += &format!("_{}", output.element.name());
    }
    name
}

fn template_line(source: &Source) -> String {
    if source.template.is_empty() {
        return String::new();
    }
    let parameter = |(name, value): &(String, crate::Template)| format!("{} {name}", value.kind());
    let parameters: Vec<_> = source.template.iter().map(parameter).collect();
    format!("template <{}>\n", parameters.join(", "))
}

/// The attributes whose names occur anywhere in `body`, be it in a comment or in a longer word.
fn attributes(body: &str) -> Vec<(&'static str, &'static str)> {
    ATTRIBUTES.into_iter().filter(|(name, _)| body.contains(name)).collect()
}

fn parameters(source: &Source, attributes: &[(&str, &str)]) -> (String, Vec<Slot>) {
    let mut text = String::new();
    let mut buffers = Vec::new();
    for (index, input) in source.inputs.iter().enumerate() {
        for (slot, declared) in input_parameters(index, input, &source.body) {
            text += &format!("  {declared} [[buffer({})]],\n", buffers.len());
            buffers.push(slot);
        }
    }
    for (index, output) in source.outputs.iter().enumerate() {
        let element = output.element.name();
        let element =
            if source.atomic_outputs { format!("atomic<{element}>") } else { element.to_owned() };
        text += &format!("  device {element}* {} [[buffer({})]]", output.name, buffers.len());
        // MLX's rule, which forgets that shapes and strides are buffers too.
        let last = buffers.len() + 1 >= source.inputs.len() + source.outputs.len();
        text += if last && attributes.is_empty() { ") {\n" } else { ",\n" };
        buffers.push(Slot::Output(index));
    }
    let list: Vec<_> =
        attributes.iter().map(|(name, kind)| format!("  {kind} {name} [[{name}]]")).collect();
    if !list.is_empty() {
        text += &(list.join(",\n") + ") {\n");
    }
    (text, buffers)
}

/// The parameters that one input becomes: itself, and those of its sizes that the body names.
fn input_parameters(index: usize, input: &Input, body: &str) -> Vec<(Slot, String)> {
    let name = &input.name;
    let space = if input.is_constant() { "constant" } else { "device" };
    let passed = if input.shape.is_empty() { "&" } else { "*" };
    let own = format!("const {space} {}{passed} {name}", input.element.name());
    let mut parameters = vec![(Slot::Input(index), own)];
    if input.shape.is_empty() {
        return parameters;
    }
    let sizes = [
        (Slot::Shape(index), "int*", format!("{name}_shape")),
        (Slot::Strides(index), "int64_t*", format!("{name}_strides")),
        (Slot::Ndim(index), "int&", format!("{name}_ndim")),
    ];
    for (slot, kind, name) in sizes {
        if body.contains(&name) {
            parameters.push((slot, format!("const constant {kind} {name}")));
        }
    }
    parameters
}

impl Generated {
    /// The text as clang takes it: C++ has no attributes on an explicit instance, and the entry makes it anyway.
    pub(crate) fn without_instance(&self) -> &str {
        &self.text[..self.instance]
    }

    /// The function that calls the kernel for one thread, with the arguments it declares.
    pub(crate) fn entry(&self, source: &Source) -> String {
        let buffers = self.buffers.iter().enumerate().map(|(i, &slot)| match slot {
            Slot::Input(input) => {
                let input = &source.inputs[input];
                let space = if input.is_constant() { "constant" } else { "device" };
                let pointer = format!("(const {space} {}*)buffers[{i}]", input.element.name());
                if input.shape.is_empty() { format!("*{pointer}") } else { pointer }
            }
            Slot::Shape(_) => format!("(const constant int*)buffers[{i}]"),
            Slot::Strides(_) => format!("(const constant int64_t*)buffers[{i}]"),
            Slot::Ndim(_) => format!("*(const constant int*)buffers[{i}]"),
            Slot::Output(output) => {
                let element = source.outputs[output].element.name();
                let atomic = format!("atomic<{element}>");
                let element = if source.atomic_outputs { &atomic } else { element };
                format!("(device {element}*)buffers[{i}]")
            }
        });
        let ids = self.attributes.iter().map(|name| format!("msl_id(ids->{name})"));
        let arguments: Vec<_> = buffers.chain(ids).collect();
        format!(
            "MSL_ENTRY(const unsigned long* buffers, const MslIds* ids) {{\n  {}{}(\n      {});\n}}\n",
            self.function,
            self.template,
            arguments.join(",\n      ")
        )
    }
}
