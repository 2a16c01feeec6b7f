import Foundation

/// What can go wrong, each with one sentence for the person who reads it.
public enum RWKVError: Error, Equatable, LocalizedError {
    /// The folder is no bundle, is damaged, or is of a newer format or another target.
    case bundle(String)
    /// The bundle is whole, but needs something that this package does not do.
    case unsupported(String)
    /// The tokenizer's file cannot be read, or cannot encode a text.
    case tokenizer(String)
    /// A state is damaged, or belongs to another model.
    case state(String)
    /// An argument is out of range.
    case input(String)
    /// Core ML did not give what the manifest promises, or numbers that are not finite.
    case model(String)

    public var errorDescription: String? {
        switch self {
        case .bundle(let text), .unsupported(let text), .tokenizer(let text), .state(let text), .input(let text),
            .model(let text):
            return text
        }
    }
}
