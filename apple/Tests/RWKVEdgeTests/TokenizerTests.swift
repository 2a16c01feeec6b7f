import Foundation
import XCTest

@testable import RWKVEdge

final class TokenizerTests: XCTestCase {
    private struct Golden: Decodable {
        struct Case: Decodable {
            let bytes: Data  // base64, which is what JSONDecoder expects
            let ids: [Int]
            let pieces: [String]
            let rest: String
            let decoded: String
        }

        let nVocab: Int
        let cases: [Case]

        enum CodingKeys: String, CodingKey {
            case cases
            case nVocab = "n_vocab"
        }
    }

    func testWorldGivesTheIdsOfThePythonRuntime() throws {
        let golden = try Goldens.read("world.json", as: Golden.self)
        let tokenizer = try WorldTokenizer(contentsOf: Goldens.world)
        XCTAssertEqual(tokenizer.nVocab, golden.nVocab)
        for one in golden.cases {
            XCTAssertEqual(tokenizer.encode(bytes: [UInt8](one.bytes)), one.ids)
            XCTAssertEqual(Data(tokenizer.decodeBytes(one.ids)), one.bytes)
            check(tokenizer, one)
        }
    }

    #if canImport(Tokenizers)
        func testTokenizerJSONGivesTheIdsOfThePythonRuntime() throws {
            let golden = try Goldens.read("tokenizer.json", as: Golden.self)
            let tokenizer = try JSONTokenizer(contentsOf: Goldens.demoTokenizer)
            XCTAssertEqual(tokenizer.nVocab, golden.nVocab)
            for one in golden.cases {
                let text = String(decoding: one.bytes, as: UTF8.self)
                XCTAssertEqual(tokenizer.encode(text), one.ids, "\(text.debugDescription)")
                check(tokenizer, one)
            }
        }

        func testATokenizerWithoutAByteIsRefused() throws {
            let whole = try String(contentsOf: Goldens.demoTokenizer, encoding: .utf8)
            let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).json")
            defer { try? FileManager.default.removeItem(at: file) }
            try whole.replacingOccurrences(of: "\"\u{143}\":", with: "\"<none>\":").write(to: file, atomically: true, encoding: .utf8)
            assertThrows("no token for some bytes") { try JSONTokenizer(contentsOf: file) }
        }

        /// What swift-transformers would end the app for.
        func testTokenizersThatWouldEndTheAppAreRefused() throws {
            let whole = try JSONSerialization.jsonObject(with: Data(contentsOf: Goldens.demoTokenizer)) as? [String: Any] ?? [:]
            let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).json")
            defer { try? FileManager.default.removeItem(at: file) }
            func open(_ change: (inout [String: Any]) -> Void) throws -> JSONTokenizer {
                var changed = whole
                change(&changed)
                try JSONSerialization.data(withJSONObject: changed).write(to: file)
                return try JSONTokenizer(contentsOf: file)
            }
            func merges(_ more: Any) -> (inout [String: Any]) -> Void {
                { whole in
                    var model = whole["model"] as? [String: Any] ?? [:]
                    model["merges"] = (model["merges"] as? [Any] ?? []) + [more]
                    whole["model"] = model
                }
            }
            XCTAssertNoThrow(try open { $0["normalizer"] = ["type": "NFC"] })
            XCTAssertNoThrow(try open { $0["post_processor"] = ["type": "Unheard"] })
            XCTAssertNoThrow(try open(merges(["t", "h"])))
            assertThrows("not a byte-level BPE") { try open { $0["normalizer"] = ["type": "Nmt"] } }
            assertThrows("not a byte-level BPE") {
                try open { $0["normalizer"] = ["type": "Sequence", "normalizers": [["type": "NFC"], ["type": "Unheard"]]] as [String: Any] }
            }
            for wrong: Any in ["lonely", ["a"], ["a", "b", "c"], "Q Q", 3] as [Any] {
                assertThrows("merges") { try open(merges(wrong)) }
            }
        }
    #endif

    /// Compare by scalars: `==` of Swift takes different code points for equal where they look the same.
    private func check(_ tokenizer: any TextTokenizer, _ one: Golden.Case) {
        XCTAssertEqual(Array(tokenizer.decode(one.ids).unicodeScalars), Array(one.decoded.unicodeScalars))
        let stream = tokenizer.stream(after: [])
        let pieces = one.ids.map { stream.push($0) }
        let rest = stream.finish()
        XCTAssertEqual(pieces.map { Array($0.unicodeScalars) }, one.pieces.map { Array($0.unicodeScalars) })
        XCTAssertEqual(Array(rest.unicodeScalars), Array(one.rest.unicodeScalars))
    }

    func testWorldEncodesEveryByteAndPairOfBytes() throws {
        let tokenizer = try WorldTokenizer(contentsOf: Goldens.world)
        for first in 0...255 {
            for second in stride(from: 0, through: 255, by: 5) {
                let bytes = [UInt8(first), UInt8(second)]
                XCTAssertEqual(tokenizer.decodeBytes(tokenizer.encode(bytes: bytes)), bytes)
            }
        }
    }

    func testWorldIgnoresIdsWithoutAToken() throws {
        let tokenizer = try WorldTokenizer(contentsOf: Goldens.world)
        XCTAssertEqual(tokenizer.decodeBytes([0, -1, 65535, 1 << 40]), [])
    }

    func testDamagedVocabulariesAreRefused() {
        for text in ["", "1 'a'\n", "1 'a' 2\n", "x 'a' 1\n", "1 'a' 1\n1 'b' 1\n", "1 a 1\n", "1 'a' 1\n"] {
            assertThrows("no World vocabulary") { try WorldTokenizer(Data(text.utf8), name: "test.txt") }
        }
    }

    func testTrieTakesTheLongest() {
        var trie = ByteTrie()
        XCTAssertFalse(trie.hasEveryByte)
        for (id, text) in ["a", "ab", "abcd", "b", "c"].enumerated() { trie.insert(Array(text.utf8), id: id) }
        func longest(_ text: String, _ place: Int) -> [Int]? {
            trie.longest(in: Array(text.utf8), from: place).map { [$0.id, $0.length] }
        }
        XCTAssertEqual(longest("abc", 0), [1, 2])  // not into abcd, which does not fit
        XCTAssertEqual(longest("abcd", 0), [2, 4])
        XCTAssertEqual(longest("abcd", 1), [3, 1])
        XCTAssertEqual(longest("a", 0), [0, 1])
        XCTAssertNil(longest("x", 0))
        XCTAssertNil(longest("a", 1))
    }

    func testPythonLiterals() {
        func bytes(_ literal: String) -> [UInt8]? {
            PythonLiteral.bytes(of: Array(literal.utf8)[...])
        }
        XCTAssertEqual(bytes("'a b'"), Array("a b".utf8))
        XCTAssertEqual(bytes("\"it's\""), Array("it's".utf8))
        XCTAssertEqual(bytes(#"'\\ \' \" \n\t\r'"#), Array("\\ ' \" \n\t\r".utf8))
        XCTAssertEqual(bytes(#"'\x80'"#), [0xC2, 0x80])  // of text, a character
        XCTAssertEqual(bytes(#"b'\x80'"#), [0x80])
        XCTAssertEqual(bytes(#"'\u2028'"#), [0xE2, 0x80, 0xA8])
        XCTAssertEqual(bytes(#"'\U0001f600'"#), [0xF0, 0x9F, 0x98, 0x80])
        XCTAssertEqual(bytes("'é'"), [0xC3, 0xA9])
        for wrong in ["", "'", "'a", "a'", "'a\"", "'a'b'", #"'\'"#, #"'\x8'"#, #"'\ud800'"#, #"b'\u2028'"#, "b'é'", #"'\N{SPACE}'"#] {
            XCTAssertNil(bytes(wrong), wrong)
        }
    }
}
