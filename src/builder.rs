//! One macro for the builders that mlx-rs modules come with.

/// Writes a builder: required arguments in `new`, a chained setter for each optional one.
///
/// The module supplies `fn assemble(builder) -> Result<Self>`, which holds every check.
macro_rules! builder {
    (
        $(#[$meta:meta])*
        $builder:ident => $module:ident
        ($($(#[$required_meta:meta])* $required:ident: $required_type:ty),* $(,)?)
        {$($(#[$optional_meta:meta])* $optional:ident: $optional_type:ty = $default:expr),* $(,)?}
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone)]
        pub struct $builder {
            $($(#[$required_meta])* pub $required: $required_type,)*
            $($(#[$optional_meta])* pub $optional: $optional_type,)*
        }

        impl $builder {
            /// Starts from the required arguments; everything else has its default.
            pub fn new($($required: impl Into<$required_type>),*) -> Self {
                Self {
                    $($required: $required.into(),)*
                    $($optional: $default,)*
                }
            }

            $(
                $(#[$optional_meta])*
                #[must_use]
                pub fn $optional(mut self, $optional: impl Into<$optional_type>) -> Self {
                    self.$optional = $optional.into();
                    self
                }
            )*
        }

        impl mlx_rs::builder::Buildable for $module {
            type Builder = $builder;
        }

        impl mlx_rs::builder::Builder<$module> for $builder {
            type Error = $crate::Error;

            fn build(self) -> $crate::Result<$module> {
                $module::assemble(self)
            }
        }
    };
}
pub(crate) use builder;
