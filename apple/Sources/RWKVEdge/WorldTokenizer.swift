import Foundation

/// RWKV's World vocabulary: at every place the longest token that fits, over bytes.
public final class WorldTokenizer: TextTokenizer {
    public let nVocab: Int
    private let trie: ByteTrie
    /// Tokens from id 65530 on, where the vocabulary that every World model has ends, and `<|...|>`.
    private let special: Set<Int>
    /// The bytes of every token, one after the other, and where each begins; ids without a token have none.
    private let bytes: [UInt8]
    private let starts: [Int]

    /// Read a vocabulary: lines of `id 'text' length` or `id b'bytes' length`.
    public convenience init(contentsOf file: URL) throws {
        guard let data = try? Data(contentsOf: file) else {
            throw RWKVError.tokenizer("\(file.lastPathComponent) is missing or cannot be read: copy the bundle again.")
        }
        try self.init(data, name: file.lastPathComponent)
    }

    init(_ data: Data, name: String) throws {
        var tokens: [Int: [UInt8]] = [:]
        for (i, line) in [UInt8](data).split(separator: UInt8(ascii: "\n")).enumerated() {
            guard let (id, token) = Self.parse(line), tokens[id] == nil else {
                throw RWKVError.tokenizer("\(name) is no World vocabulary: line \(i + 1) is not `id 'text' length`, or repeats an id.")
            }
            tokens[id] = token
        }
        nVocab = 1 + (tokens.keys.max() ?? 0)
        var trie = ByteTrie()
        special = Set(tokens.filter { $0.key >= 65530 || Self.isMarker($0.value) }.keys)
        var bytes: [UInt8] = []
        var starts = [0]
        for id in 0..<nVocab {
            if let token = tokens[id] {
                trie.insert(token, id: id)
                bytes += token
            }
            starts.append(bytes.count)
        }
        guard trie.hasEveryByte else {
            throw RWKVError.tokenizer("\(name) is no World vocabulary: it lacks a byte.")
        }
        self.trie = trie
        self.bytes = bytes
        self.starts = starts
    }

    public func encode(_ text: String) -> [Int] {
        encode(bytes: Array(text.utf8))
    }

    public func encode(_ text: String, specialTokens: Bool) -> [Int] {
        encode(bytes: Array(text.utf8), specialTokens: specialTokens)
    }

    /// Give the ids of bytes, of which any can be encoded.
    public func encode(bytes: [UInt8], specialTokens: Bool = true) -> [Int] {
        var ids: [Int] = []
        var place = 0
        while place < bytes.count {
            // every byte is a token
            guard let (id, length) = trie.longest(in: bytes, from: place, except: specialTokens ? [] : special) else { break }
            ids.append(id)
            place += length
        }
        return ids
    }

    /// Give the bytes of ids: what was encoded, byte for byte. Ids without a token have none.
    public func decodeBytes(_ ids: [Int]) -> [UInt8] {
        var found: [UInt8] = []
        for id in ids where (0..<nVocab).contains(id) {
            found += bytes[starts[id]..<starts[id + 1]]
        }
        return found
    }

    public func decode(_ ids: [Int]) -> String {
        String(decoding: decodeBytes(ids), as: UTF8.self)
    }

    public func stream(after ids: [Int]) -> any TextStream {
        WorldStream(self, after: ids)
    }

    /// Whether a token is `<|...|>`.
    private static func isMarker(_ token: [UInt8]) -> Bool {
        token.count >= 4 && token.starts(with: Array("<|".utf8)) && token.suffix(2).elementsEqual(Array("|>".utf8))
    }

    /// `id literal length`; nil if a line is something else.
    private static func parse(_ line: ArraySlice<UInt8>) -> (id: Int, token: [UInt8])? {
        let space = UInt8(ascii: " ")
        let line = line.last == UInt8(ascii: "\r") ? line.dropLast() : line
        guard let first = line.firstIndex(of: space), let last = line.lastIndex(of: space), first < last,
            let id = Int(String(decoding: line[..<first], as: UTF8.self)), (1..<1 << 20).contains(id),
            let length = Int(String(decoding: line[(last + 1)...], as: UTF8.self)),
            let token = PythonLiteral.bytes(of: line[(first + 1)..<last]), token.count == length, length > 0
        else { return nil }
        return (id, token)
    }
}

/// Decodes World's tokens one by one.
private final class WorldStream: TextStream {
    private let tokenizer: WorldTokenizer
    private var decoder = UTF8Stream()

    init(_ tokenizer: WorldTokenizer, after ids: [Int]) {
        self.tokenizer = tokenizer
        _ = decoder.push(tokenizer.decodeBytes(Array(ids.suffix(4))))
    }

    var isUnfinished: Bool { !decoder.pending.isEmpty }

    func push(_ id: Int) -> String {
        decoder.push(tokenizer.decodeBytes([id]))
    }

    func finish() -> String {
        decoder.finish()
    }
}
