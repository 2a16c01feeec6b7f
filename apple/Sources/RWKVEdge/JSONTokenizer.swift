#if canImport(Tokenizers)

import Foundation
import Hub
import Tokenizers

/// A `tokenizer.json` of the tokenizers library: byte-level BPE, as every RWKV with such a file has it.
///
/// swift-transformers reads it. What that package would end the app for is refused here first.
public final class JSONTokenizer: TextTokenizer, @unchecked Sendable {
    public let nVocab: Int
    // they are not changed after they were made
    private let tokenizer: any Tokenizers.Tokenizer
    /// The same, to which special tokens are text.
    private let ordinary: any Tokenizers.Tokenizer

    public init(contentsOf file: URL) throws {
        let name = file.lastPathComponent
        guard let data = try? Data(contentsOf: file), var parsed = (try? JSONSerialization.jsonObject(with: data)) as? [NSString: Any],
            let model = parsed["model"] as? [String: Any], let added = (parsed["added_tokens"] ?? [Any]()) as? [[String: Any]]
        else {
            throw RWKVError.tokenizer("\(name) is no tokenizer.json: copy the bundle again.")
        }
        guard model["type"] as? String == "BPE", Self.types(parsed["pre_tokenizer"]).contains("ByteLevel"),
            Self.types(parsed["decoder"]) == ["ByteLevel"], let vocab = model["vocab"] as? NSDictionary, let merges = model["merges"] as? [Any],
            Set(Self.types(parsed["pre_tokenizer"])).isSubset(of: ["Sequence", "ByteLevel", "Split", "Digits", "Punctuation"]),
            Set(Self.types(parsed["normalizer"])).isSubset(of: ["Sequence", "NFC", "NFD", "NFKC", "NFKD"])
        else {
            throw RWKVError.unsupported("\(name) is not a byte-level BPE, which is the kind that this package reads.")
        }
        // that package ends the app at a byte without a token; C0, C1 and F5 to FF are in no text
        guard Self.alphabet.allSatisfy({ vocab.object(forKey: $0) is Int }) else {
            throw RWKVError.unsupported("\(name) has no token for some bytes, which this package cannot leave out.")
        }
        // and at a merge of anything but two texts, or into what is no token
        let areMerges = merges.allSatisfy { merge in
            let pair = merge as? [String] ?? (merge as? String)?.components(separatedBy: " ") ?? []
            return pair.count == 2 && vocab.object(forKey: pair.joined()) is Int
        }
        guard areMerges else {
            throw RWKVError.tokenizer("\(name) has merges that do not fit its vocabulary: copy the bundle again.")
        }
        parsed["post_processor"] = nil  // it would only add special tokens, and not every kind is known there
        // settings of a training: swift-transformers reads neither these nor the model's dropout, and shall not begin to
        parsed["truncation"] = nil
        parsed["padding"] = nil
        let ids = vocab.allValues.compactMap { $0 as? Int } + added.compactMap { $0["id"] as? Int }
        nVocab = 1 + (ids.max() ?? 0)
        do {
            tokenizer = try Self.open(parsed)
            parsed["added_tokens"] = added.filter { !Self.isSpecial($0) }
            ordinary = try Self.open(parsed)
        } catch {
            throw RWKVError.tokenizer("\(name) cannot be read: \(error.localizedDescription)")
        }
    }

    private static func open(_ parsed: [NSString: Any]) throws -> any Tokenizers.Tokenizer {
        // without the last, " ." would be decoded as "."
        try AutoTokenizer.from(
            tokenizerConfig: Config(["tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": false] as [NSString: Any]),
            tokenizerData: Config(parsed))
    }

    /// Whether an added token is special, or in the form of one: `<tool_call>`. Others, such as runs of blanks, are text.
    private static func isSpecial(_ added: [String: Any]) -> Bool {
        let content = added["content"] as? String ?? ""
        return added["special"] as? Bool ?? false || (content.count > 2 && content.hasPrefix("<") && content.hasSuffix(">"))
    }

    public func encode(_ text: String) -> [Int] {
        encode(text, specialTokens: true)
    }

    public func encode(_ text: String, specialTokens: Bool) -> [Int] {
        (specialTokens ? tokenizer : ordinary).encode(text: text, addSpecialTokens: false)
    }

    public func decode(_ ids: [Int]) -> String {
        tokenizer.decode(tokens: ids, skipSpecialTokens: false)
    }

    public func stream(after ids: [Int]) -> any TextStream {
        JSONStream(self, after: ids)
    }

    /// What byte-level BPE writes for the bytes of UTF-8: printable ones of Latin-1 as they are, the others from U+0100 on.
    private static var alphabet: [String] {
        let kept = [33...126, 161...172, 174...191, 194...244].flatMap { Array($0) }
        return (kept + Array(256...323)).compactMap { Unicode.Scalar($0).map(String.init) }
    }

    /// The types of a component and, of a sequence, those of its members.
    private static func types(_ component: Any?) -> [String] {
        guard let about = component as? [String: Any], let type = about["type"] as? String else { return [] }
        let members = (about["pretokenizers"] ?? about["decoders"] ?? about["normalizers"]) as? [Any] ?? []
        return [type] + members.flatMap { types($0) }
    }
}

/// Decodes an id together with a few before it: some tokenizers join neighbours.
private final class JSONStream: TextStream {
    /// Ids that can still change how the next one reads: a character has at most four.
    private static let window = 8

    private let tokenizer: JSONTokenizer
    private var ids: [Int]
    /// How much of the text of `ids` was given: in scalars, which do not merge with what comes later.
    private var nShown = 0
    private(set) var isUnfinished = false

    init(_ tokenizer: JSONTokenizer, after ids: [Int]) {
        self.tokenizer = tokenizer
        self.ids = Array(ids.suffix(Self.window))
        nShown = whole().count
    }

    func push(_ id: Int) -> String {
        ids.append(id)
        let new = show(whole())
        if ids.count > 2 * Self.window {
            ids = Array(ids.suffix(Self.window))
            nShown = whole().count
        }
        return new
    }

    func finish() -> String {
        isUnfinished = false
        return show(Array(tokenizer.decode(ids).unicodeScalars))
    }

    private func show(_ text: [Unicode.Scalar]) -> String {
        var new = String.UnicodeScalarView()
        new.append(contentsOf: text.dropFirst(nShown))
        nShown = text.count
        return String(new)
    }

    /// The text of `ids`, less a last character that more bytes could finish: one U+FFFD, as in Python. Others before it are text.
    private func whole() -> [Unicode.Scalar] {
        var text = Array(tokenizer.decode(ids).unicodeScalars)
        isUnfinished = text.last == "\u{FFFD}"
        if isUnfinished { text.removeLast() }
        return text
    }
}

#endif
