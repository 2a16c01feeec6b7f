import Foundation

/// Text to token ids and back.
public protocol TextTokenizer: Sendable {
    /// Ids run from 0 to `nVocab - 1`.
    var nVocab: Int { get }

    /// Give the ids of a text.
    ///
    /// - Parameter specialTokens: false where the text of a special token is text as any other, such as `<|im_end|>` in a message
    func encode(_ text: String, specialTokens: Bool) throws -> [Int]

    /// Give the text of ids; bytes that are no UTF-8 become U+FFFD.
    func decode(_ ids: [Int]) -> String

    /// Decode token by token what comes after these ids.
    func stream(after ids: [Int]) -> any TextStream
}

extension TextTokenizer {
    /// Give the ids of a text, in which special tokens are found.
    public func encode(_ text: String) throws -> [Int] {
        try encode(text, specialTokens: true)
    }
}

/// Turns ids into text as they come, never splitting a character.
public protocol TextStream: AnyObject {
    /// Whether the last ids may be a part of a character.
    var isUnfinished: Bool { get }

    /// Take one more id and give the text that is now whole, which may be empty.
    func push(_ id: Int) -> String

    /// Give what is held back: U+FFFD for an unfinished character.
    func finish() -> String
}

extension ModelBundle {
    /// Open the bundle's tokenizer; nil if it has none.
    public func openTokenizer() throws -> (any TextTokenizer)? {
        guard let about = manifest.tokenizer else { return nil }
        switch about.kind {
        case "world": return try WorldTokenizer(contentsOf: url(of: about.file))
        case "json":
            #if canImport(Tokenizers)
                return try JSONTokenizer(contentsOf: url(of: about.file))
            #else
                throw RWKVError.unsupported("A tokenizer.json needs the package swift-transformers, which is not part of this build.")
            #endif
        default: throw RWKVError.unsupported("The tokenizer is of the kind \(about.kind), which this release does not know: update the app.")
        }
    }
}
